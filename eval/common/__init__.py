"""What every evaluation shares: settings, records, statistics, timing, several processes."""
