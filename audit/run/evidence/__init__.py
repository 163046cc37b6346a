"""Images kept beside records: stored, read back by `rvaudit verify`, exported."""
