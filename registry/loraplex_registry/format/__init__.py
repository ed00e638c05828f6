"""What lies in a bucket: keys, records, manifests, tags, canonical JSON and digests."""
