"""INT8 calibration of the text experts."""
