"""Ways to look at records: the HTML report of one request, and the explorer."""
