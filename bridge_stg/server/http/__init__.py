"""HTTP of the server: errors, schemas, multipart, security, documentation page."""
