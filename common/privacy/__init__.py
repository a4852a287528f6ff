"""What privacy costs: accounting and calibration, without state."""
