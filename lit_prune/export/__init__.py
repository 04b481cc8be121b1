"""Export of a model: the run's folder, the formats, the verification, and the upload to the hub."""
