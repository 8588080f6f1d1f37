"""What people run. Imports anything; nothing imports it."""
