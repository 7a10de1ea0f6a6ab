"""Models on the Hugging Face hub: fetched, pushed, and their cards."""
