"""Models as graphs for other runtimes, their exits included."""
