"""The calibration report: result, page, figures."""
