"""The networks whose attention finds the object, and their maps in batches."""
