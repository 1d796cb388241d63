"""Reports of runs and comparisons: tables, figures, completions side by side."""
