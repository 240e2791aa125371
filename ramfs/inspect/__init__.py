"""What can be seen of a mount without changing it: status, metrics, page counts."""
