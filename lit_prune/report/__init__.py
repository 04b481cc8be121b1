"""The report of a run: report.json, table, picture and model card."""
