"""The order of the stages: media -> detect -> track -> align -> age -> blend -> media. No arithmetic on pixels here."""
