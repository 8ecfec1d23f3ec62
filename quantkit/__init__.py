"""quantkit."""
