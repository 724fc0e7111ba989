"""Train the demo's backbone to answer in text: spans and boxes as JSON, on the same synthetic clips."""
