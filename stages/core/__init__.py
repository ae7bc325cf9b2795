"""What all stages share: parameters, files, records, resuming, hardware, progress."""
