"""The Hugging Face folder: written aside, reopened and compared, sent to the hub."""
