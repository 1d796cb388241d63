"""The settings of a run: schema, validation, loading, specs and recipes."""
