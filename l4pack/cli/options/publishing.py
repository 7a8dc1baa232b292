"""How an artifact is named, signed and published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NameOption = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="The name to publish under; from source and recipe unless given."),
]
BaseModelOption = Annotated[
    str | None,
    typer.Option("--base-model", metavar="ORG/NAME", help="The original's repository, for the card."),
]
OfOption = Annotated[
    Path | None,
    typer.Option("--of", metavar="ARTIFACT", help="The artifact's folder, where DIR is an export of it."),
]
TemplateOption = Annotated[
    Path | None,
    typer.Option("--template", metavar="FILE", help="Your own card (Jinja); the licence block stays."),
]
GatedOption = Annotated[
    bool, typer.Option("--gated", help="Let readers of the repository in by request only; the card has its fields.")
]
SignOption = Annotated[
    Path | None,
    typer.Option("--sign", metavar="KEY", help="Sign every file with this SSH key, as ssh-keygen -Y sign does."),
]
SignatureOption = Annotated[
    Path | None,
    typer.Option(
        "--signature", metavar="ALLOWED_SIGNERS", help="Whether one of ssh-keygen's allowed signers signed every file."
    ),
]
FamilyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--family",
        metavar="DIR|ORG/NAME|collections/OWNER/SLUG",
        help="Another artifact of the same model, or all of a collection, for a table on the card; may be repeated.",
    ),
]
PushOption = Annotated[str | None, typer.Option("--push", metavar="ORG/NAME", help="Upload when all is well.")]
PublicOption = Annotated[bool, typer.Option("--public", help="Make the repository public; private unless said.")]
RevisionOption = Annotated[str, typer.Option("--revision", metavar="BRANCH", help="The branch to put it on.")]
PullRequestOption = Annotated[bool, typer.Option("--pr", help="Open a pull request instead of committing.")]
TagOption = Annotated[str | None, typer.Option("--tag", metavar="TAG", help="Tag the commit.")]
CollectionOption = Annotated[
    str | None, typer.Option("--collection", metavar="SLUG|TITLE", help="Add it to a collection; a title makes one.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace files that l4pack did not put there.")]
