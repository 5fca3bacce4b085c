"""Files and folders: outputs that appear whole, locks, journals, digests, and inputs that are read with care."""
