"""Who calls: credentials, principals, and the one table of what each kind of caller may do."""
