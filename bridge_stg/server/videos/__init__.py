"""Videos of the server: uploads, their check, stills, the cache of opened videos."""
