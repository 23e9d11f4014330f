"""Types, registry, configuration, errors and seeding. Imports nothing heavier than torch."""
