"""Tables derived from records: the leaderboard, its columns and ranking, comparisons, calibration."""
