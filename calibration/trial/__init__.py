"""A plan tried in memory before it is written: answers, their distance, a budget."""
