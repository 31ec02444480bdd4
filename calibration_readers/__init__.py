"""Calibration readers that qdeploy ships with; each is a plug-in."""
