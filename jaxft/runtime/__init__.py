"""What is not about models: storage, processes, files of others, the sandbox that renders their templates."""
