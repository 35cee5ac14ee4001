"""A network traced by operator into a plan of fixed-point steps."""
