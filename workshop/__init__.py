"""How the shipped base, the scene teacher and the language VLM were made: `python -m workshop NAME`."""
