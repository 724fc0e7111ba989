"""Score a quantized bundle by boxes and time spans, and by speed."""
