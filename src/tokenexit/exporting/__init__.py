"""Models are exported as graphs for other runtimes, their exits included."""
