"""The processes of a training job: starting, watching and ending them."""
