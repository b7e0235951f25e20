"""The `lighthouse` command. Importing it imports neither torch nor pydantic."""
