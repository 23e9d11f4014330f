"""One recipe (pipeline), many of them (study), and the files that keep their results."""
