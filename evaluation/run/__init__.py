"""Run models over many samples, in this process or on many devices, with results that a later run resumes."""
