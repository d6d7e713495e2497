"""What is derived from records: tables, plots, the page of results."""
