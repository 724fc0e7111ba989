"""Jobs of the server: queue, scheduler, events, rendering."""
