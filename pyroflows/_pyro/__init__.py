"""The fence: what leans on private names of torch and Pyro lives here."""
