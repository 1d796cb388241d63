"""Tables in text files of any encoding, with the lines of their rows."""
