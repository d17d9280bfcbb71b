"""Job records on S3: leases, claims, the index and the sweep."""
