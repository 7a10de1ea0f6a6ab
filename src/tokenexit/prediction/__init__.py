"""Label maps and figures in the layouts of others."""
