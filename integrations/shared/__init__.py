"""What plugins of engines have in common; a link to it is in each of them, and a wheel has its files."""
