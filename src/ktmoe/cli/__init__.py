"""The command line: one small file per verb. Nothing else imports this package."""
