"""What is worked on: sources, artifacts, checks, repositories."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SourceOption = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Checkpoint folder (safetensors, or Meta's consolidated.NN.pth with params.json), ORG/NAME[@REVISION] on the "
        "Hub, a config.json, llama-4-scout, llama-4-maverick, or demo.",
        show_default=False,
    ),
]
ArtifactOption = Annotated[Path, typer.Argument(metavar="DIR", help="Artifact folder.", show_default=False)]
ArtifactsOption = Annotated[
    list[str],
    typer.Argument(
        metavar="DIR|ORG/NAME...", help="Artifact folders or repositories on the Hub, two or more.", show_default=False
    ),
]
SubjectOption = Annotated[
    str | None,
    typer.Argument(
        metavar="ARTIFACT|SOURCE|RECIPE",
        help="Artifact or checkpoint folder, Hub id, config.json, known model, or a shipped recipe that promises one.",
    ),
]
RequiredSubjectOption = Annotated[
    str,
    typer.Argument(
        metavar="ARTIFACT|SOURCE|RECIPE",
        help="Artifact or checkpoint folder, Hub id, known model, or a shipped recipe that promises one.",
        show_default=False,
    ),
]
ChecksOption = Annotated[
    list[Path] | None, typer.Argument(metavar="[FILE]...", help="The checks; l4pack-budget.yaml unless given.")
]
AuditedOption = Annotated[
    str, typer.Argument(metavar="DIR|ORG/NAME", help="A folder, or a repository on the Hub.", show_default=False)
]
RepositoryOption = Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository.", show_default=False)]
ExplainedOption = Annotated[str | None, typer.Argument(metavar="NAME", help="Explain one; without it, list all.")]
AgainstOption = Annotated[
    str | None, typer.Option("--against", metavar="SOURCE", help="The original checkpoint to compare with.")
]
LoraOption = Annotated[
    list[str] | None,
    typer.Option(
        "--lora",
        metavar="ADAPTER",
        help="LoRA adapter in peft's format, a folder or ORG/NAME[@REVISION], merged into the original; may be repeated.",
    ),
]
OriginalSourceOption = Annotated[
    str | None,
    typer.Option("--source", metavar="SOURCE", help="The original, where the folder lacks its licence."),
]
IncludeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="GLOB",
        help="Carry these files of the source too; may be repeated. Tokenizer, processor, template, licence go unasked.",
    ),
]
CompanionsOption = Annotated[
    str | None,
    typer.Option(
        "--companions",
        metavar="SOURCE",
        help="Folder or ORG/NAME that has the original's tokenizer, processor and config.json, where its weights lie alone, "
        "as Meta's .pth files do.",
    ),
]
FetchAsYouGoOption = Annotated[
    bool, typer.Option("--fetch-as-you-go", help="Download a Hub source shard by shard and drop each after use.")
]
