"""Other purification defenses under one suite of attacks; its workflow is dvc.yaml here."""
