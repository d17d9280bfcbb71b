"""The web page: orders and watches jobs in a browser. All HTML is rendered here."""
