"""Tables in files: texts of any encoding, delimited cells and JSON, with the lines of their rows."""
