"""nanomimi."""
