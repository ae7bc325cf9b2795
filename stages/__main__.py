"""``python -m stages STAGE ...`` is ``stochsec STAGE ...``."""

from stages.cli import app

app(prog_name="stochsec")
