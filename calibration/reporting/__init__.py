"""What a calibration did and what it cost: JSON, table and page."""
