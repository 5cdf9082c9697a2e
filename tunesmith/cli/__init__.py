"""The command line: `main` and one file per verb. Everything a person types ends here; nothing else imports it."""
